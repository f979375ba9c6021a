"""Train class-conditional generators and export them as artifacts."""
