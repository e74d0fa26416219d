"""What is wanted becomes what is."""
