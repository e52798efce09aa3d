"""The way from files to views: reading, the store, placements, drawing."""
