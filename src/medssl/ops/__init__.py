"""Small operations on tensors and networks that methods and training share."""
