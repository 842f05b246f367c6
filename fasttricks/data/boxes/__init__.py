"""Images with boxes, each of a class: Pascal VOC's layout.

source: the images and boxes of a split. annotation: the objects in an XML file. checks: which of them are used. lists: the lists
of a split, and the files of its images. places: the layout on disk, and the faults of a data set. None of these needs torch.
views: the image that is shown. samples: an image's part of a batch, in any process. loader: the batches. batch: one of them.
"""
