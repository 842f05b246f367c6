"""Input: folders of images in (sources, packing), normalised channels-last batches on the device out (pipeline, batch)."""
