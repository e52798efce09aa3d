"""From files to views: reading, the store, placements, drawing."""
