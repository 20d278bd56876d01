"""What runs inside the sandbox beside a solution. Read as text, never imported by the trainer."""
