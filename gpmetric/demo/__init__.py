"""The embedded model, the script that trains it, and the text every machine has."""
