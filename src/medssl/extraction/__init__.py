"""From a trained encoder to features of subjects, of locations and of points, and what they are used for."""
