"""What this project is measured by; every benchmark has its reference in the same run."""
