"""Images with a class for each pixel.

source: the images and masks of a split. places: the layouts on disk. classes: the files that name the classes. pixels: a file's
pixels. No torch.
"""
