"""What makes the method fast and safe. A reader of the method may skip all of it."""
