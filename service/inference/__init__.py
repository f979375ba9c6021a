"""Seeds and labels to pixels; knows no bytes."""
