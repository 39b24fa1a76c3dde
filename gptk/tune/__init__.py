"""Launch configurations measured on the user's GPU, for a file that the user can keep."""
