"""The parts that images with masks and images with boxes share.

files: the names of the files that belong to an image. samples: an image's part of a batch, in any process. workers: these
processes. loader: the batches. pixels: resize and normalisation. Only files needs no torch; loader and pixels need torchvision.
"""
