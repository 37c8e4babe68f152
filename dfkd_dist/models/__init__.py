"""Networks: teachers, students, generators and the weights they load."""
