"""Tables that are derived from the cases of a store, one file a case: keypoints, locations, heights, pairs, ..."""
