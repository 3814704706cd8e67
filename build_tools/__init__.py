"""What setup.py is made of, apart from the libraries' own plan."""
