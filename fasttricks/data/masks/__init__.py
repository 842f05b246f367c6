"""Images with a class for each pixel.

source: the images and masks of a split. places: the layouts on disk. classes: the files that name the classes. pixels: a file's
pixels. frequencies: the pixels of each class, counted. None of these needs torch. views: the part of an image that is shown.
samples: an image's part of a batch, in any process. loader: the batches. batch: one of them.
"""
