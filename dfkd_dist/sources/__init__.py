"""Where a student's next images come from."""
