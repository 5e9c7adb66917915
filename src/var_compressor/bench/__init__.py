"""How fast, how large, and how near to what the machine can do: `varc bench`."""
