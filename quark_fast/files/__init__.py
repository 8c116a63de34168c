"""Reading and writing files and text safely."""
