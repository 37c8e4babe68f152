"""De-confounding the student's logits before they are compared with the teachers'."""
