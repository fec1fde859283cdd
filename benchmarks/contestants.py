"""What the benchmarks run, each in a process of its own: `contestants.py FUNCTION JSON` calls it
with these arguments, and prints what it returns.
"""

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

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = ROOT / 'MNIST_data'


def peak(whose=resource.RUSAGE_SELF):
    """The largest memory so far of this process, or of its children, in MB (on Linux)."""
    return resource.getrusage(whose).ru_maxrss * 1024 / 1e6


def timed(function, *arguments):
    """Seconds that it takes, and what it returns."""
    began = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - began, result


def start(*arguments, cwd, env):
    """Starts `python` with these arguments; what it prints goes into a pipe."""
    return subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=env,
                            stdout=subprocess.PIPE, text=True)


def run_script(*arguments):
    """Seconds that `python` with these arguments takes from start to end."""
    began = time.perf_counter()
    process = start(*arguments, cwd=ROOT, env={**os.environ})
    process.communicate()
    if process.returncode:
        raise RuntimeError(f'{arguments} ended with code {process.returncode}')
    return time.perf_counter() - began


# The loader: loading, and minibatches of 50

def run_loader(load, epochs):
    """Loads, draws minibatches for some epochs, and tells what that took."""
    import psutil
    before = psutil.Process().memory_info().rss
    load_seconds, train = timed(load)
    seconds = [timed(train.next_batch, 50)[0]
               for _ in range(epochs * train.num_examples // 50)]
    return {'load s': load_seconds, 'batch us': statistics.mean(seconds) * 1e6,
            'memory MB': (psutil.Process().memory_info().rss - before) / 1e6}


def loader_ours(epochs):
    """This project's loader."""
    import input_data
    return run_loader(lambda: input_data.read_data_sets(DATA, one_hot=True).train, epochs)


def loader_1x(epochs):
    """The 1.x way, written down plainly: all as float32, and all of it copied at an epoch's end."""
    import numpy as np

    class Train:
        def __init__(self, images, labels):
            self.images = np.multiply(images.astype(np.float32), 1 / 255)
            self.labels, self.num_examples, self.start = labels, len(images), len(images)

        def next_batch(self, size):
            left = slice(self.start, self.start + size)
            images, labels = self.images[left], self.labels[left]
            self.start += size
            if self.start > self.num_examples:
                order = np.arange(self.num_examples)
                np.random.shuffle(order)
                self.images, self.labels = self.images[order], self.labels[order]
                self.start = size - len(images)
                images = np.concatenate([images, self.images[:self.start]])
                labels = np.concatenate([labels, self.labels[:self.start]])
            return images, labels

    def load():
        parts = {}
        for part in ('train', 't10k'):
            images, labels = (gzip.decompress((DATA / f'{part}-{kind}-ubyte.gz').read_bytes())
                              for kind in ('images-idx3', 'labels-idx1'))
            images = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 784)
            labels = np.frombuffer(labels, np.uint8, offset=8)
            one_hot = np.zeros((len(labels), 10))
            one_hot[np.arange(len(labels)), labels] = 1
            parts[part] = images, one_hot
        (images, labels), test = parts['train'], parts['t10k']
        load.sets = [Train(images[5000:], labels[5000:]), Train(images[:5000], labels[:5000]),
                     Train(*test)]  # the caller of 1.x holds all three
        return load.sets[0]
    return run_loader(load, epochs)


# A training step: batch 50, dropout 0.5, Adam at 1e-4

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


def step_ms(seconds):
    """The median in ms; the first twenty steps are left out."""
    return {'step ms': statistics.median(list(seconds)[20:]) * 1e3}


def step_ours(steps, bfloat16=False):
    """This project's graph and session."""
    import mnist_deep
    tf = mnist_deep.tf
    if bfloat16 and not mnist_deep.computes_in_bfloat16():
        return {'skipped': 'this CPU does not compute in bfloat16'}
    x, y_, keep_prob, _, train_step = network()
    with tf.Session(config=mnist_deep.session_config(bfloat16)) as sess:
        sess.run(tf.global_variables_initializer())
        return step_ms(timed(sess.run, train_step, {x: images, y_: labels, keep_prob: 0.5})[0]
                       for images, labels in batches(20 + steps))


def step_keras(steps):
    """Keras `fit`."""
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
    images, labels = map(np.concatenate, zip(*batches(21 + steps)))
    ends = []
    model.fit(images.reshape(-1, 28, 28, 1), labels, batch_size=50, verbose=0, callbacks=[
        keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter()))])
    return step_ms(np.diff(ends).tolist())


def step_torch(steps):
    """PyTorch."""
    import torch
    from torch import nn
    torch.set_num_threads(os.cpu_count())
    model = nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 1024), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, 10))
    assert sum(weights.numel() for weights in model.parameters()) == 3274634
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    loss_of = nn.CrossEntropyLoss()

    def step(images, labels):
        optimizer.zero_grad()
        logits = model(torch.from_numpy(images).view(-1, 1, 28, 28))
        loss_of(logits, torch.from_numpy(labels).float()).backward()
        optimizer.step()
    return step_ms(timed(step, *batch)[0] for batch in batches(20 + steps))


# The test evaluation

def evaluation(at_once):
    """All test images through the network, after some training, as scripts do."""
    import input_data
    import mnist_deep
    tf = mnist_deep.tf
    test = input_data.read_data_sets(DATA, one_hot=True).test
    x, y_, keep_prob, y_conv, train_step = network()
    correct = tf.equal(tf.argmax(y_conv, 1), tf.argmax(y_, 1))

    def evaluate():
        for digits, labels in ([test.next_batch(10000, shuffle=False)] if at_once
                               else mnist_deep.in_batches(test)):
            sess.run(correct, {x: digits, y_: labels, keep_prob: 1.0})

    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        for digits, labels in batches(5):
            sess.run(correct, {x: digits, y_: labels, keep_prob: 1.0})
            sess.run(train_step, {x: digits, y_: labels, keep_prob: 0.5})
        return {'evaluation s': timed(evaluate)[0], 'peak MB': peak()}


# The whole run

def whole_run(steps, flags):
    """mnist_deep.py from start to end; a --model_dir lies in a folder of this run's own."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = run_script('mnist_deep.py', f'--max_steps={steps}',
                             *[flag.replace('FOLDER', folder) for flag in flags])
    return {'s': seconds, 'peak MB': peak(resource.RUSAGE_CHILDREN)}


# Reading pictures

def reading(model_dir, way, digits):
    """The share of pasted digits that is read right, of all and of those of 60 pixels and more.

    `way`: 'normalised', 'resized' to 28x28 with dark ink made light, or 'directly', MNIST's digits
    themselves.
    """
    import numpy as np
    from PIL import Image

    import input_data
    import mnist_deep
    import model_dir as kept
    from extras.pictures import normalise
    from tests import photographs
    tf = mnist_deep.tf
    test = input_data.read_data_sets(DATA).test
    camera, random = photographs.Camera(seed=1), np.random.RandomState(1)
    chosen = random.permutation(10000)[:digits]
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
            return normalise(picture)
        except ValueError:  # an answer that is wrong
            return np.zeros(784, np.float32)
    images = [seen(*each) for each in zip(chosen, sizes)]
    x = tf.placeholder(tf.float32, [None, 784])
    y_conv, keep_prob = mnist_deep.deepnn(x)
    with tf.Session() as sess:
        kept.restore_newest(model_dir)
        right = np.concatenate([sess.run(y_conv, {x: images[i:i + 200], keep_prob: 1.0}).argmax(1)
                                for i in range(0, digits, 200)]) == test.labels[chosen]
    return {'right %': 100 * right.mean(), 'from 60 pixels %': 100 * right[sizes >= 60].mean()}


def predict(model_dir, height, width, pictures):
    """extras.predict on so many pictures of that size: the time of each beyond the start-up."""
    import numpy as np
    from PIL import Image

    import input_data
    digit = input_data.read_data_sets(DATA).test.images[0].reshape(28, 28)
    scale = min(height, width) // 40
    page = np.full([height, width], 220, np.uint8)
    page[scale * 5:scale * 33, scale * 5:scale * 33] -= np.round(180 * digit).astype(
        np.uint8).repeat(scale, axis=0).repeat(scale, axis=1)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'picture.jpg')
        Image.fromarray(page).convert('RGB').save(path, quality=95)
        once, all_of_them = (run_script('-m', 'extras.predict', '--model_dir', model_dir,
                                        *[path] * count) for count in (1, 1 + pictures))
    return {'pictures per s': pictures / (all_of_them - once), 'start-up and one s': once,
            'peak MB': peak(resource.RUSAGE_CHILDREN)}


# Many workers

def training(steps, batch, command):
    """A training script's steps, by the lines that it prints, and what goes over loopback."""
    import psutil
    process = start(*command, f'--max_steps={steps}', f'--batch_size={batch}', cwd=ROOT,
                    env={**os.environ})
    marks = [(int(line.split()[1].rstrip(',')), time.perf_counter(),
              psutil.net_io_counters(pernic=True)['lo'].bytes_sent)
             for line in process.stdout if line.startswith('step ')]
    process.communicate()
    if process.returncode:
        raise RuntimeError(f'{command} ended with code {process.returncode}')
    # From step 100 on, where there is more: the first steps are slower.
    (first, began, before), (last, ended, after) = marks[len(marks) > 2], marks[-1]
    return {'step ms': (ended - began) / (last - first) * 1e3,
            'images per s': batch * (last - first) / (ended - began),
            'loopback MB per step': (after - before) / (last - first) / 1e6}


if __name__ == '__main__':
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
