"""What a user names to bytes, under limits."""
