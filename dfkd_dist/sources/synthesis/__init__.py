"""Ways to make images for one teacher, round by round."""
