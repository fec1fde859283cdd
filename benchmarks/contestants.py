"""What the benchmarks run, each in a process of its own: `contestants.py NAME JSON` prints JSON.

A function here is a contestant; its arguments come from the JSON, what it returns is printed.
"""

import contextlib
import gzip
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DATA = ROOT / 'MNIST_data'
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def rss():
    """This process's memory now, in MB."""
    import psutil
    return psutil.Process().memory_info().rss / 1e6


def peak():
    """This process's largest memory so far, in MB."""
    scale = 1 if sys.platform == 'darwin' else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6


def timed(function, *arguments):
    """Seconds that it takes, and what it returns."""
    began = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - began, result


def median(seconds):
    """The median, in ms."""
    return statistics.median(seconds) * 1e3


# The loader

def run_loader(load, epochs):
    """Loads, draws batches of 50 for some epochs, and tells what that took."""
    before = rss()
    load_seconds, train = timed(load)
    times = [timed(lambda: train.next_batch(50))[0]
             for _ in range(int(epochs * train.num_examples / 50))]
    return {'load s': load_seconds, 'memory MB': rss() - before,
            'batch us': sum(times) / len(times) * 1e6, 'worst batch ms': max(times) * 1e3,
            'images': train.num_examples}


def loader_ours(epochs, folder=str(DATA)):
    """This project's loader; and what no loader can do without: unpacking the files, in one go."""
    import input_data
    result = run_loader(lambda: input_data.read_data_sets(folder, one_hot=True).train, epochs)
    packed = [path.read_bytes() for path in pathlib.Path(folder).glob('*.gz')]
    if packed:
        result['gunzip s'] = median(
            timed(lambda: [zlib.decompress(body, wbits=31) for body in packed])[0]
            for _ in range(5)) / 1e3
    return result


def loader_1x(epochs, folder=str(DATA)):
    """The 1.x way, written down plainly: all as float32, and all of it copied at an epoch's end."""
    import numpy as np

    def read(name, header):
        path = pathlib.Path(folder, name)
        with path.open('rb') if path.exists() else gzip.open(f'{path}.gz') as f:
            return np.frombuffer(f.read(), np.uint8, offset=header)

    class Train:
        def __init__(self, images, labels):
            self.images = np.multiply(images.astype(np.float32), 1 / 255)
            self.labels, self.num_examples, self.start, self.fresh = labels, len(images), 0, True

        def shuffle(self):
            order = np.arange(self.num_examples)
            np.random.shuffle(order)
            self.images, self.labels = self.images[order], self.labels[order]

        def next_batch(self, size):
            if self.fresh:
                self.shuffle()
                self.fresh = False
            start, self.start = self.start, self.start + size
            if self.start <= self.num_examples:
                return self.images[start:self.start], self.labels[start:self.start]
            images, labels = self.images[start:], self.labels[start:]
            self.shuffle()
            self.start = size - len(images)
            return (np.concatenate([images, self.images[:self.start]]),
                    np.concatenate([labels, self.labels[:self.start]]))

    def load():
        sets = []
        for part in ('train', 't10k'):
            images = read(f'{part}-images-idx3-ubyte', 16).reshape(-1, 784)
            labels = read(f'{part}-labels-idx1-ubyte', 8)
            one_hot = np.zeros((len(labels), 10))
            one_hot[np.arange(len(labels)), labels] = 1
            for chosen in ((slice(5000, None), slice(5000)) if part == 'train' else (slice(None),)):
                sets.append(Train(images[chosen], one_hot[chosen]))
        load.sets = sets  # the caller of 1.x holds all three
        return sets[0]
    return run_loader(load, epochs)


def loader_keras(epochs, npz):
    """Keras's load_data, of an .npz with the same arrays, and slices of a permutation."""
    os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
    import numpy as np
    from tensorflow import keras
    module = sys.modules[keras.datasets.mnist.load_data.__module__]
    module.get_file = lambda *args, **kwargs: npz  # instead of the download

    class Train:
        def __init__(self):
            (images, labels), self.test = keras.datasets.mnist.load_data()
            self.images = images.reshape(-1, 784).astype('float32') / 255
            self.labels = keras.utils.to_categorical(labels, 10)
            self.num_examples, self.start = len(images), len(images)

        def next_batch(self, size):
            if self.start + size > self.num_examples:
                self.order, self.start = np.random.permutation(self.num_examples), 0
            rows = self.order[self.start:self.start + size]
            self.start += size
            return self.images[rows], self.labels[rows]
    return run_loader(Train, epochs)


# A training step: batch 50, dropout 0.5, Adam at 1e-4

# Floating-point operations of each layer's forward pass for one image: a multiplication and an
# addition for each weight at each place where it is used.
FORWARD = {'conv1': 2 * 28 * 28 * 5 * 5 * 1 * 32, 'conv2': 2 * 14 * 14 * 5 * 5 * 32 * 64,
           'fc1': 2 * 7 * 7 * 64 * 1024, 'fc2': 2 * 1024 * 10}
# Backward, the gradients of weights and of inputs take as much each; the images need none.
STEP_FLOP = 50 * (3 * sum(FORWARD.values()) - FORWARD['conv1'])
# Adam reads a weight, its gradient and two moments, and writes the weight and the moments.
ADAM_BYTES = 3274634 * 4 * 7
PRODUCT_FLOP = 2 * 2048**3


def batches(count):
    """Some batches of 50 real digits."""
    import input_data
    train = input_data.read_data_sets(DATA, one_hot=True, seed=0).train
    return [train.next_batch(50) for _ in range(count)]


def network():
    """This project's graph: its placeholders x, y_ and keep_prob, y_conv, and its training step."""
    import mnist_deep
    tf = mnist_deep.tf
    x = tf.placeholder(tf.float32, [None, 784])
    y_ = tf.placeholder(tf.float32, [None, 10])
    y_conv, keep_prob = mnist_deep.deepnn(x)
    train_step = tf.train.AdamOptimizer(1e-4).minimize(tf.reduce_mean(
        tf.nn.softmax_cross_entropy_with_logits(labels=y_, logits=y_conv)))
    return x, y_, keep_prob, y_conv, train_step


def product_ms(sess, times):
    """What a plain float32 matrix product of PRODUCT_FLOP operations takes in a session.

    A median, as the figures that are held against it are: a minimum would count the machine's own
    unrest as ours.
    """
    import mnist_deep
    tf = mnist_deep.tf
    a, b = (tf.Variable(tf.random.normal([2048, 2048])) for _ in range(2))
    product = tf.matmul(a, b).op
    sess.run([a.initializer, b.initializer])
    return median(timed(lambda: sess.run(product))[0] for _ in range(times))


def step_ours(steps, bfloat16=False):
    """This project's graph and session; and the machine's own limit, in the same process."""
    import numpy as np

    import mnist_deep
    tf = mnist_deep.tf
    if bfloat16 and not mnist_deep.computes_in_bfloat16():
        return {'skipped': 'this CPU does not compute in bfloat16'}
    x, y_, keep_prob, _, train_step = network()
    source = np.ones(1 << 26, np.uint8)
    target = np.zeros_like(source)
    fed = batches(20 + steps)
    with tf.Session(config=mnist_deep.session_config(bfloat16)) as sess:
        sess.run(tf.global_variables_initializer())
        times = [timed(sess.run, train_step, {x: images, y_: labels, keep_prob: 0.5})[0]
                 for images, labels in fed][20:]
        result = {'step ms': median(times)}
        if not bfloat16:
            product = product_ms(sess, min(steps, 20))
            copy_ms = median(timed(lambda: np.copyto(target, source))[0] for _ in range(20))
            copied = 2 * source.nbytes
            result['limit ms'] = STEP_FLOP / PRODUCT_FLOP * product + ADAM_BYTES / copied * copy_ms
            result['product GFLOP/s'] = PRODUCT_FLOP / product / 1e6
            result['copy GB/s'] = copied / copy_ms / 1e6
    return result


def step_keras(steps):
    """Keras `fit`."""
    os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
    import numpy as np
    from tensorflow import keras
    layers = keras.layers
    model = keras.Sequential([
        layers.Input([28, 28, 1]),
        layers.Conv2D(32, 5, padding='same', activation='relu'), layers.MaxPool2D(),
        layers.Conv2D(64, 5, padding='same', activation='relu'), layers.MaxPool2D(),
        layers.Flatten(), layers.Dense(1024, activation='relu'), layers.Dropout(0.5),
        layers.Dense(10)])
    assert model.count_params() == 3274634
    model.compile(optimizer=keras.optimizers.Adam(1e-4),
                  loss=keras.losses.CategoricalCrossentropy(from_logits=True))
    images, labels = map(np.concatenate, zip(*batches(20 + steps)))
    ends = []
    model.fit(images.reshape(-1, 28, 28, 1), labels, batch_size=50, verbose=0, callbacks=[
        keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter()))])
    return {'step ms': median(np.diff(ends[20:]).tolist())}


def step_torch(steps, channels_last=False, bfloat16=False):
    """PyTorch."""
    import torch
    from torch import nn
    torch.set_num_threads(THREADS)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 1024), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, 10))
    assert sum(weights.numel() for weights in model.parameters()) == 3274634
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    loss_of = nn.CrossEntropyLoss()

    def step(images, labels):
        images = torch.from_numpy(images).view(-1, 1, 28, 28).contiguous(memory_format=layout)
        optimizer.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
            loss = loss_of(model(images), torch.from_numpy(labels).float())
        loss.backward()
        optimizer.step()

    times = [timed(step, *batch)[0] for batch in batches(20 + steps)]
    return {'step ms': median(times[20:])}


# The test evaluation

def evaluation(at_once, images, products):
    """Test accuracy, evaluated once after some training, as scripts do; time and peak memory.

    The limit is the floating-point operations at the rate of a plain float32 matrix product.
    """
    import input_data
    import mnist_deep
    tf = mnist_deep.tf
    test = input_data.read_data_sets(DATA, one_hot=True).test
    fed = batches(5)
    x, y_, keep_prob, y_conv, train_step = network()
    correct = tf.equal(tf.argmax(y_conv, 1), tf.argmax(y_, 1))

    def evaluate():
        parts = ([test.next_batch(images, shuffle=False)] if at_once
                 else mnist_deep.in_batches(test))
        seen = 0
        for batch in parts:
            seen += len(sess.run(correct, {x: batch[0], y_: batch[1], keep_prob: 1.0}))
            if seen >= images:
                break

    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        for digits, labels in fed:
            sess.run(correct, {x: digits, y_: labels, keep_prob: 1.0})
            sess.run(train_step, {x: digits, y_: labels, keep_prob: 0.5})
        result = {'evaluation s': timed(evaluate)[0], 'peak MB': peak()}
        result['limit s'] = images * sum(FORWARD.values()) / PRODUCT_FLOP * product_ms(
            sess, products) / 1e3
    return result


# The whole run

def whole_run(steps, flags, began):
    """mnist_deep.py with these flags: what its parts take, and what 20,000 steps make of them.

    `began` is the time, in seconds since the epoch, at which the process was asked for.
    """
    import mnist_deep
    session = mnist_deep.tf.Session
    run, calls = session.run, []

    def recorded(self, fetches, *args, **kwargs):
        start = time.time()
        result = run(self, fetches, *args, **kwargs)
        calls.append((getattr(fetches, 'name', str(fetches)), start, time.time()))
        return result
    session.run = recorded
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        mnist_deep.main([f'--max_steps={steps}', *flags])
    ended = time.time()

    def is_work(name):  # saving and drawing the mistakes run in the session, too, but are extras
        return not name.startswith('save') and 'map' not in name
    train = [call for call in calls if call[0].startswith('adam_optimizer')]
    loop_began, loop_ended = train[0][1], train[-1][2]
    work = sum(end - start for name, start, end in calls
               if is_work(name) and loop_began <= start <= loop_ended)
    after = sum(end - start for name, start, end in calls if is_work(name) and start > loop_ended)
    loop, rest = loop_ended - loop_began, ended - began - (loop_ended - loop_began) - after
    full = 20000 / steps
    outside = rest + (loop - work) * full
    return {'s per 1,000 steps': loop / steps * 1000, 'peak MB': peak(),
            '20,000 steps: min': (rest + after + loop * full) / 60,
            'outside the session %': 100 * outside / (rest + after + loop * full)}


# Reading pictures

def reading(model_dir, way, digits):
    """The share of pasted digits that is read right, of all and of those of 60 pixels and more.

    `way`: 'normalised', 'resized' to 28x28 with dark ink made light, or 'directly', MNIST's digits
    themselves.
    """
    import numpy as np
    from PIL import Image
    sys.path.insert(0, str(ROOT / 'tests'))
    import photographs

    import input_data
    import mnist_predict
    tf = mnist_predict.tf
    test = input_data.read_data_sets(DATA).test
    camera, random = photographs.Camera(seed=1), np.random.RandomState(1)
    chosen = random.permutation(len(test.images))[:digits]
    sizes = np.exp(random.uniform(np.log(28), np.log(1000), digits)).astype(int)

    def seen(number, size):
        light_ink = random.rand() < 0.5
        picture = camera.photograph(test.images[number], size, light_ink)
        if way == 'directly':
            return test.images[number]
        if way == 'resized':
            small = Image.fromarray(picture[..., 0]).resize((28, 28), Image.BOX)
            small = np.asarray(small, np.float32).ravel() / 255
            return small if light_ink else 1 - small
        try:
            return mnist_predict.normalise(picture)
        except ValueError:  # an answer that is wrong
            return np.zeros(784, np.float32)
    images = [seen(*each) for each in zip(chosen, sizes)]
    x = tf.placeholder(tf.float32, [None, 784])
    y_conv, keep_prob = mnist_predict.mnist_deep.deepnn(x)
    with tf.Session() as sess:
        tf.train.Saver().restore(sess, tf.train.latest_checkpoint(model_dir))
        right = np.concatenate([sess.run(y_conv, {x: images[i:i + 200], keep_prob: 1.0}).argmax(1)
                                for i in range(0, digits, 200)]) == test.labels[chosen]
    return {'right %': 100 * right.mean(), 'from 60 pixels %': 100 * right[sizes >= 60].mean()}


def predict(model_dir, height, width, pictures):
    """mnist_predict.py on so many pictures of that size: the time of each beyond the start-up."""
    import numpy as np

    import input_data
    import mnist_predict
    tf = mnist_predict.tf
    digit = input_data.read_data_sets(DATA).test.images[0].reshape(28, 28)
    scale = min(height, width) // 40
    page = np.full([height, width, 3], 220, np.uint8)
    page[scale * 5:scale * 33, scale * 5:scale * 33] -= np.round(180 * digit).astype(
        np.uint8).repeat(scale, axis=0).repeat(scale, axis=1)[..., np.newaxis]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'picture.jpg')
        with tf.Graph().as_default(), tf.Session() as sess, open(path, 'wb') as f:
            f.write(sess.run(tf.image.encode_jpeg(page)))

        def run(count):
            subprocess.run([sys.executable, ROOT / 'mnist_predict.py', '--model_dir', model_dir,
                            *[path] * count], check=True, stdout=subprocess.DEVNULL)
        once, all_of_them = timed(run, 1)[0], timed(run, 1 + pictures)[0]
    return {'pictures per s': pictures / (all_of_them - once), 'start-up and one s': once,
            'peak MB': resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6}


# Many workers

def training(script, steps, batch, flags):
    """A training script's steps, by the lines that it prints, and what goes over loopback."""
    import psutil

    def sent():
        return psutil.net_io_counters(pernic=True)['lo'].bytes_sent
    process = subprocess.Popen([sys.executable, ROOT / script, f'--max_steps={steps}',
                                f'--batch_size={batch}', *flags],
                               stdout=subprocess.PIPE, text=True)
    marks = []
    for line in process.stdout:
        if line.startswith('step '):
            marks.append((int(line.split()[1].rstrip(',')), time.perf_counter(), sent()))
    if process.wait():
        raise RuntimeError(f'{script} ended with code {process.returncode}')
    # From step 100 on, where there is more: the first steps are slower.
    (first, began, sent_before), (last, ended, sent_after) = marks[1 if len(marks) > 2 else 0], \
        marks[-1]
    result = {'step ms': (ended - began) / (last - first) * 1e3,
              'images per s': batch * (last - first) / (ended - began)}
    if script == 'mnist_replica.py':
        result['loopback MB per step'] = (sent_after - sent_before) / (last - first) / 1e6
    return result


if __name__ == '__main__':
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
