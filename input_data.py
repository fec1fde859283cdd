"""MNIST for TensorFlow 1.x programs: downloads it, checks it, yields minibatches.

A drop-in for `tensorflow.examples.tutorials.mnist.input_data`, which left TensorFlow in 2.0. Copy
this one file beside a script and change the script's import line to `import input_data`. It needs
Python 3.10 and NumPy, nothing else.

    mnist = input_data.read_data_sets('MNIST_data', one_hot=True)
    images, labels = mnist.train.next_batch(50)     # [50, 784] in [0, 1], [50, 10]

The files are in the IDX format: big-endian 32-bit numbers (a magic number, whose last byte counts
the dimensions, and the length of each), then one unsigned byte per pixel (0 background, 255 ink)
or per label. Format and data: Y. LeCun, C. Cortes, C. J. C. Burges,
http://yann.lecun.com/exdb/mnist/ (a page that now refuses programs).
"""

import collections
import contextlib
import gzip
import hashlib
import http.client
import io
import math
import operator
import os
import struct
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zlib

import numpy as np

DEFAULT_SOURCE_URL = 'https://storage.googleapis.com/cvdf-datasets/mnist/'
_MIRRORS = (DEFAULT_SOURCE_URL, 'https://ossci-datasets.s3.amazonaws.com/mnist/')
_HOME_PAGE = 'http://yann.lecun.com/exdb/mnist/'  # what older scripts name; served by the mirrors

_IMAGES, _LABELS = 2051, 2049  # the magic numbers of the two kinds of file

# Name, kind, and SHA-256 of MNIST's own contents, unpacked. Other data sets (Fashion-MNIST, KMNIST)
# come under the same names.
_FILES = {
    'train-images-idx3-ubyte.gz':
        (_IMAGES, 'ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db'),
    'train-labels-idx1-ubyte.gz':
        (_LABELS, '65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5'),
    't10k-images-idx3-ubyte.gz':
        (_IMAGES, '0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7'),
    't10k-labels-idx1-ubyte.gz':
        (_LABELS, 'ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2'),
}

_TIMEOUT = 15  # seconds to connect, and without a byte, before a server counts as stalled
_PAUSES = (0, 1, 3)  # seconds before each round through the mirrors

Datasets = collections.namedtuple('Datasets', ['train', 'validation', 'test'])


def read_data_sets(train_dir, fake_data=False, one_hot=False, dtype=np.float32, reshape=True,
                   validation_size=5000, seed=None, source_url=DEFAULT_SOURCE_URL):
    """Loads the four files of a data set in MNIST's format; downloads those that are missing.

    A damaged file of MNIST's own is set aside as `NAME.damaged-...` and downloaded anew.

    Args:
        train_dir: folder of the four files, gzipped or unpacked; made if it is not there.
        fake_data: True for data sets of ones, without files, to test a program with.
        one_hot: True for labels as one-hot rows, False for the class numbers.
        dtype: of the images: float32 for [0, 1], uint8 for 0..255. TensorFlow's or NumPy's, or
            its name.
        reshape: True for flat images [n, rows * columns], False for [n, rows, columns, 1].
        validation_size: how many training examples, from the first on, are kept for validation.
        seed: of the minibatches' order, 0 to 2**32 - 1; None for another order in each run.
        source_url: where missing files come from: a file's name is appended to it.

    Returns:
        `Datasets(train, validation, test)`, each a `DataSet`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or out of range.
        ValueError: a file is damaged or does not fit the others, and cannot be replaced safely.
        OSError: the folder cannot be used, or no source gave a good file.
    """
    dtype = _image_dtype(dtype)
    validation_size = _whole_number('validation_size', validation_size, 0)
    options = dict(one_hot=one_hot, dtype=dtype, reshape=reshape, seed=seed)
    _random_state(seed)  # a bad seed shows before any file is read
    if fake_data:
        return Datasets(*(DataSet([], [], fake_data=True, **options) for _ in Datasets._fields))

    arrays = _load(os.fspath(train_dir), source_url or DEFAULT_SOURCE_URL)
    (train_images, train_labels), (test_images, test_labels) = (
        _pair(arrays, part, one_hot) for part in ('train', 't10k'))
    if validation_size > len(train_images):
        raise ValueError(f'validation_size is {validation_size}, expected 0 to '
                         f'{len(train_images)}, the number of training examples')
    split = validation_size
    return Datasets(train=DataSet(train_images[split:], train_labels[split:], **options),
                    validation=DataSet(train_images[:split], train_labels[:split], **options),
                    test=DataSet(test_images, test_labels, **options))


def load_mnist(train_dir='MNIST-data'):
    """Loads MNIST with `read_data_sets` and its defaults."""
    return read_data_sets(train_dir)


class DataSet:
    """Images and their labels, handed out in minibatches, epoch by epoch."""

    def __init__(self, images, labels, fake_data=False, one_hot=False, dtype=np.float32,
                 reshape=True, seed=None):
        """Takes the examples over; float32 images are the given ones times 1/255.

        Args:
            images: uint8 array [n, rows, columns, 1], values 0..255.
            labels: array [n] of class numbers, or one-hot [n, classes].
            fake_data: True for 10,000 examples of 784 ones and class 0; images and labels unused.
            one_hot: whether the labels of fake data are one-hot rows.
            dtype, reshape, seed: as for `read_data_sets`.

        Raises:
            TypeError, ValueError: an argument of the wrong type, out of range or shape.
        """
        dtype = _image_dtype(dtype)
        self._random = _random_state(seed)
        self._fake_data, self._one_hot = fake_data, one_hot
        if fake_data:
            images, labels = np.ones((0, 1, 784, 1), np.uint8), np.zeros(0, np.uint8)
        images, labels = np.asarray(images), np.asarray(labels)
        if len(images) != len(labels):
            raise ValueError(f'{len(images)} images, but {len(labels)} labels: expected as many')
        if reshape:
            if images.ndim != 4 or images.shape[3] != 1:
                raise ValueError(f'images of shape {list(images.shape)}, expected '
                                 '[n, rows, columns, 1]; reshape=False takes any')
            images = images.reshape(len(images), images.shape[1] * images.shape[2])

        # Bytes, a quarter of the float32 values' memory, until `images` is asked for; copied where
        # somebody else could still write into them.
        self._as_bytes = dtype == np.float32 and images.dtype == np.uint8
        if self._as_bytes and images.flags.writeable:
            images = images.copy()
        elif dtype == np.float32 and not self._as_bytes:
            images = _scale(images)
        self._images, self._labels = images, labels
        self._num_examples = 10000 if fake_data else len(images)
        self._epochs_completed = 0
        self._index_in_epoch = 0
        self._order = np.arange(len(images))

    @property
    def images(self):
        """All images, in the files' order; what is written into them shows in later batches."""
        if self._as_bytes:
            self._images, self._as_bytes = _scale(self._images), False
        elif not self._images.flags.writeable:
            self._images = self._images.copy()
        return self._images

    @property
    def labels(self):
        """All labels: uint8 [n], or one-hot float64 [n, 10]."""
        return self._labels

    @property
    def num_examples(self):
        """Number of examples."""
        return self._num_examples

    @property
    def epochs_completed(self):
        """How often the examples have been gone through; goes up with a new epoch's first batch."""
        return self._epochs_completed

    def next_batch(self, batch_size, fake_data=False, shuffle=True):
        """Returns the next examples of this epoch and, if it ends, of those that follow.

        Args:
            batch_size: number of examples, at least 1.
            fake_data: True for ones and class 0 instead.
            shuffle: whether an epoch that begins with this batch gets a new order.

        Returns:
            images [batch_size, ...] and labels [batch_size, ...], as the data set's own; copies.

        Raises:
            TypeError, ValueError: batch_size is no whole number, or less than 1.
            ValueError: the data set is empty.
        """
        batch_size = _whole_number('batch_size', batch_size, 1)
        if fake_data or self._fake_data:
            classes = np.zeros(batch_size, np.uint8)
            return (np.ones((batch_size, 784), np.float32),
                    dense_to_one_hot(classes, 10) if self._one_hot else classes)
        if not self._num_examples:
            raise ValueError('this data set has no examples to take a batch from')

        # An epoch is a permutation and its slices. TensorFlow 1.x shuffled the shuffled examples
        # again at each epoch's end; so does this, on their numbers.
        if shuffle and self._epochs_completed == 0 and self._index_in_epoch == 0:
            self._shuffle()
        slices, missing = [], batch_size
        while missing > self._num_examples - self._index_in_epoch:
            slices.append(self._order[self._index_in_epoch:])
            missing -= len(slices[-1])
            self._epochs_completed += 1
            self._index_in_epoch = 0
            if shuffle:
                self._shuffle()
        start, self._index_in_epoch = self._index_in_epoch, self._index_in_epoch + missing
        slices.append(self._order[start:self._index_in_epoch])

        rows = np.concatenate(slices)
        images = self._images[rows]
        return _scale(images) if self._as_bytes else images, self._labels[rows]

    def _shuffle(self):
        order = np.arange(self._num_examples)
        self._random.shuffle(order)
        self._order = self._order[order]


def extract_images(f):
    """Reads a gzipped IDX file of images.

    Args:
        f: binary file object of the gzip data.

    Returns:
        uint8 array [n, rows, columns, 1], values 0..255.

    Raises:
        ValueError: the data is damaged, or not of images.
    """
    return _read_idx(f, _IMAGES)[..., np.newaxis]


def extract_labels(f, one_hot=False, num_classes=10):
    """Reads a gzipped IDX file of labels.

    Args:
        f: binary file object of the gzip data.
        one_hot: True for one-hot rows.
        num_classes: length of a one-hot row.

    Returns:
        uint8 array [n], or one-hot float64 [n, num_classes].

    Raises:
        ValueError: the data is damaged, or not of labels, or has no room in a one-hot row.
    """
    labels = _read_idx(f, _LABELS)
    return dense_to_one_hot(labels, num_classes) if one_hot else labels


def dense_to_one_hot(labels_dense, num_classes):
    """Turns class numbers, an integer array [n], into one-hot rows, float64 [n, num_classes].

    Raises:
        ValueError: a class number is not below num_classes.
    """
    labels_dense = np.asarray(labels_dense).ravel()
    if labels_dense.size and not 0 <= labels_dense.min() <= labels_dense.max() < num_classes:
        raise ValueError(f'labels from {labels_dense.min()} to {labels_dense.max()}, where one-hot '
                         f'rows of {num_classes} classes take 0 to {num_classes - 1}')
    labels_one_hot = np.zeros((len(labels_dense), num_classes))
    labels_one_hot[np.arange(len(labels_dense)), labels_dense] = 1
    return labels_one_hot


def maybe_download(filename, work_directory, source_url):
    """Downloads a file unless it is there already.

    Args:
        filename: its name. One of MNIST's four is checked whole before it appears.
        work_directory: its folder, made if it is not there.
        source_url: the file's whole URL.

    Returns:
        The file's path.

    Raises:
        OSError: the folder cannot be used, or no source gave a good file.
    """
    path = os.path.join(work_directory, filename)
    if not os.path.exists(path):
        _prepare_folder(work_directory)
        _fetch(path, source_url, f'{path} is missing')
    return path


def _image_dtype(dtype):
    """NumPy's dtype for TensorFlow's or NumPy's, or its name."""
    found = np.dtype(getattr(dtype, 'as_numpy_dtype', dtype))
    if found not in (np.float32, np.uint8):
        raise TypeError(f'dtype is {dtype!r}, expected float32 or uint8')
    return found


def _whole_number(name, value, least, most=math.inf):
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f'{name} is {value!r}, expected a whole number') from None
    if not least <= number <= most:
        raise ValueError(f'{name} is {number}, expected '
                         + (f'at least {least}' if most == math.inf else f'{least} to {most}'))
    return number


def _random_state(seed):
    """A generator of its own for each data set, with TensorFlow 1.x's orders."""
    if seed is not None:  # 1.x took seeds modulo 2**31 - 1
        seed = _whole_number('seed', seed, 0, 2**32 - 1) % (2**31 - 1)
    return np.random.RandomState(seed)


def _scale(images):
    """float32 [0, 1] for bytes 0..255."""
    return np.multiply(images, np.float32(1 / 255), dtype=np.float32)


def _pair(arrays, part, one_hot):
    """The images [n, rows, columns, 1] and labels of a part, 'train' or 't10k'."""
    images_name, labels_name = (name for name in _FILES if name.startswith(part))
    images, labels = arrays[images_name], arrays[labels_name]
    if len(images) != len(labels):
        raise ValueError(f'{images_name} holds {len(images)} images, but {labels_name} '
                         f'{len(labels)} labels: they belong to different data sets')
    images.flags.writeable = False  # the data sets share it
    if one_hot:
        try:
            labels = dense_to_one_hot(labels, 10)
        except ValueError as error:
            raise ValueError(f'{labels_name}: {error}; one_hot=False reads it') from None
    return images[..., np.newaxis], labels


def _load(folder, source_url):
    """The contents of the four files, by name; fetches what is missing or damaged."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise NotADirectoryError(f'{folder} is a file, expected a folder for the data set')
    arrays, faults = {}, {}
    for name, (magic, _) in _FILES.items():
        path = packed = os.path.join(folder, name)
        unpacked = packed.removesuffix('.gz')
        if os.path.exists(unpacked) and not os.path.exists(packed):
            path = unpacked
        try:
            with open(path, 'rb') as f:
                arrays[name] = _read_idx(f, magic)
        except (FileNotFoundError, NotADirectoryError):
            faults[name] = f'{packed} is missing', None
        except ValueError as error:
            faults[name] = f'{path} is damaged: {error}', path

    if not faults:
        return arrays

    mnist_is_wanted = source_url in (DEFAULT_SOURCE_URL, _HOME_PAGE)
    strangers = [name for name in arrays if _sha256(arrays[name]) != _FILES[name][1]]
    for fault, damaged in faults.values():
        if mnist_is_wanted and strangers:  # MNIST's file among another set's would train on both
            raise ValueError(f'{fault}; {strangers[0]} beside it is not from MNIST, so MNIST\'s '
                             'own is not fetched: put the right file there, or name its source_url')
        if damaged and not mnist_is_wanted:
            raise ValueError(f'{fault}; delete it to have it fetched from {source_url}, or put '
                             'a whole copy there by hand')
    _prepare_folder(folder)
    for name, (fault, damaged) in faults.items():
        arrays[name] = _fetch(os.path.join(folder, name), source_url + name, fault, damaged)
    return arrays


def _read_idx(f, magic):
    """The array in an IDX file, gzipped or not; ValueError tells what is wrong with it."""
    start = f.read(2)
    f.seek(-len(start), os.SEEK_CUR)
    stream = gzip.GzipFile(fileobj=f) if start == b'\x1f\x8b' else f
    contents = bytearray()  # grows with what there is, whatever the header promises
    try:
        header = stream.read(4 * (1 + magic % 256))
        if header[:4] != struct.pack('>I', magic):
            raise ValueError(f'it begins with {header[:16]!r}, expected magic number {magic}')
        if len(header) < 4 * (1 + magic % 256):
            raise ValueError(f'it ends within its header, after {len(header)} bytes')
        shape = struct.unpack(f'>{magic % 256}I', header[4:])
        size = math.prod(shape)
        while len(contents) <= size and (piece := stream.read(1 << 20)):
            contents += piece
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f'its gzip data is broken ({error})') from error
    if len(contents) != size:
        found = f'{len(contents):,}' if len(contents) < size else 'more'
        raise ValueError(f'its header promises {size:,} bytes, {list(shape)}, but it holds {found}')
    return np.frombuffer(contents, np.uint8).reshape(shape)


def _sha256(array):
    """SHA-256 of the IDX file that holds the array."""
    magic = _IMAGES if array.ndim == 3 else _LABELS
    digest = hashlib.sha256(struct.pack(f'>{1 + array.ndim}I', magic, *array.shape))
    digest.update(array)
    return digest.hexdigest()


def _prepare_folder(folder):
    """Makes the folder; an OSError tells, before anything is fetched, that it can't be written."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, f'the data cannot be kept here ({error.strerror}): name a '
                      'folder that can be written', folder) from error


def _fetch(path, source_url, fault, damaged=None):
    """Downloads a file, checks it, and only then puts it in place; returns its array, if it's IDX.

    A damaged file is set aside. `fault` begins the error if no source has a good file.
    """
    name = os.path.basename(path)
    magic, sha256 = _FILES.get(name, (None, None))
    mirrors = [mirror + name for mirror in _MIRRORS]
    if source_url not in (DEFAULT_SOURCE_URL + name, _HOME_PAGE + name):
        mirrors, sha256 = [source_url], None

    def check(body):
        array = magic and _read_idx(io.BytesIO(body), magic)
        if sha256 and _sha256(array) != sha256:
            raise ValueError('another file than MNIST\'s (by its SHA-256)')
        return array

    body, array = _download(mirrors, check, fault)
    part = f'{path}.{os.urandom(4).hex()}.part'
    try:
        with open(part, 'xb') as f:
            f.write(body)
        if damaged:
            aside = f'{damaged}.damaged-{os.urandom(4).hex()}'
            with contextlib.suppress(FileNotFoundError):  # another process has done it
                os.rename(damaged, aside)
            print(f'{fault}; set aside as {aside}, fetched anew', file=sys.stderr)
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)
    return array


def _download(urls, check, fault):
    """The first body that passes `check`, with what that returned, from the URLs tried in turn."""
    reasons, hopeful = {}, list(urls)
    for pause in _PAUSES:
        if hopeful:
            time.sleep(pause)
        for url in list(hopeful):
            try:
                body = _get(url)
                return body, check(body)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reasons[url] = str(error) or repr(error)
                # The server's last word, but for 408 (it timed out) and 429 (too many requests).
                if 400 <= getattr(error, 'code', 0) < 500 and error.code not in (408, 429):
                    hopeful.remove(url)
    tried = '; '.join(f'{url}: {reason}' for url, reason in reasons.items())
    raise OSError(f'{fault}, and could not be fetched from {tried}; put the file there by hand')


def _get(url):
    """The body at a URL, whole; shows its progress on a terminal."""
    body = bytearray()
    shows = sys.stderr.isatty()
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            size = response.headers['Content-Length']
            while piece := response.read(1 << 16):
                body += piece
                if shows:
                    share = f'{len(body) / int(size):4.0%}' if size else f'{len(body):,} bytes'
                    print(f'\r{url} {share}', end='', file=sys.stderr, flush=True)
    finally:
        if shows:
            print(file=sys.stderr)
    if size and len(body) != int(size):
        raise ConnectionError(f'cut off after {len(body):,} of {size} bytes')
    return body
