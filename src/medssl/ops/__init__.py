"""Small tools that methods and training share."""
