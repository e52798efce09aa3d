"""From segmentations to numbers that can be trusted, and from the numbers of several runs to a comparison."""
