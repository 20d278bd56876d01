"""Files that run in the sandbox beside a solution: read as text, never imported by the trainer."""
