"""What a student, or an assistant, minimises on a batch."""
