"""From a trained network to a segmentation on the grid of the image itself."""
