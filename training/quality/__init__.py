"""The certificate: an evaluation report stored inside the artifact."""
