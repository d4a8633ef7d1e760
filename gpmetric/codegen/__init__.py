"""Code that is generated while we run: a formula as text of functions, and written module files imported again."""
