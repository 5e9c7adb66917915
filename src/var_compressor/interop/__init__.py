"""Reading and writing other people's formats."""
