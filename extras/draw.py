"""Draw a digit in the browser, and watch both networks of the tutorial read it.

    python mnist_deep.py --model_dir model    # trains, some minutes
    python -m extras.draw --model_dir model    # http://127.0.0.1:8000/

The page shows what the convolutional network and softmax regression answer, what they see, and what
the layers of the convolutional network find in it. Only this machine can open it.
"""

import argparse
import base64
import contextlib
import hashlib
import http.server
import io
import json
import os
import re
import sys
import threading
import webbrowser

import input_data
import mnist_deep
import model_dir
from extras.pictures import normalise, open_picture

tf = mnist_deep.tf

# The tensors that the page shows. Whatever a graph computes can be fetched by its name: that of the
# operation, whose scopes are those in `mnist_deep.deepnn`, and the number of its output.
LAYERS = ('conv1/Relu:0', 'pool1/MaxPool:0', 'conv2/Relu:0', 'pool2/MaxPool:0')


def both_networks(sess, flags):
    """Builds the tutorial's two models: the first one is restored, the second one is trained.

    Returns:
        Function: float32 image [784] to what the page shows of it, a dict that JSON can hold.

    Raises:
        OSError, ValueError: there is no trained network, or the data cannot be had.
    """
    # The convolutional network, as mnist_deep.py has trained it
    x = tf.placeholder(tf.float32, shape=[None, 784])
    y_conv, keep_prob = mnist_deep.deepnn(x)
    model_dir.restore_newest(flags.model_dir)

    # Softmax regression, as in mnist_softmax.py: a second's training
    W = tf.Variable(tf.zeros([784, 10]))
    b = tf.Variable(tf.zeros([10]))
    y = tf.matmul(x, W) + b
    y_ = tf.placeholder(tf.float32, shape=[None, 10])
    cross_entropy = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(labels=y_, logits=y))
    train_step = tf.train.GradientDescentOptimizer(0.5).minimize(cross_entropy)
    sess.run([W.initializer, b.initializer])
    mnist = input_data.read_data_sets(flags.data_dir, one_hot=True)
    for _ in range(1000):
        batch = mnist.train.next_batch(100)
        train_step.run(feed_dict={x: batch[0], y_: batch[1]})

    probabilities = [tf.nn.softmax(y_conv), tf.nn.softmax(y)]

    def look(image):
        (deep, softmax), layers = sess.run([probabilities, LAYERS], {x: [image], keep_prob: 1.0})
        return {'digit': int(deep.argmax()),
                'deep': deep[0].tolist(), 'softmax': softmax[0].tolist(),
                # Levels of grey from 0 to 255; those of a layer's features are on one scale
                'image': (255 * image.reshape(28, 28)).round().astype(int).tolist(),
                'layers': {name: (255 / (layer.max() or 1) * layer[0]).round().astype(int)
                           .transpose(2, 0, 1).tolist() for name, layer in zip(LAYERS, layers)}}
    return look


def main(argv=None):
    """Serves the page until Ctrl-C; `argv` is a list of flags, the command line's if None.

    OSError, ValueError: the port is taken, or there is no trained network or no data.
    """
    flags = parse_flags(argv)
    with tf.Graph().as_default(), tf.Session() as sess, Server(flags.port) as server:
        server.look = both_networks(sess, flags)
        address = f'http://127.0.0.1:{server.server_port}/'
        print(address, flush=True)
        if not flags.no_browser:
            threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
        server.serve_forever()


# The tutorial ends here. The rest is the server and the flags.

PAGE = os.path.join(os.path.dirname(os.path.realpath(__file__)), 'draw.html')
MAX_BYTES = 20_000_000  # of a picture that is sent


class Server(http.server.ThreadingHTTPServer):
    """Listens on 127.0.0.1 alone, and reads pictures with its attribute `look`."""

    request_queue_size = 100

    def __init__(self, port):
        try:
            super().__init__(('127.0.0.1', port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, 'strerror', error)
            raise OSError(f'--port {port}: {reason}; name another one') from None
        self.hosts = [f'{name}:{self.server_port}' for name in ('127.0.0.1', 'localhost', '[::1]')]
        with open(PAGE, encoding='utf-8') as f:  # with the ends of lines that a browser sees
            page = f.read()
        self.page = page.encode()
        # The page may run its own script, have its own style and ask this server: nothing else.
        script, style = (base64.b64encode(hashlib.sha256(re.search(
            f'<{tag}>(.*?)</{tag}>', page, re.DOTALL)[1].encode()).digest()).decode()
            for tag in ('script', 'style'))
        self.policy = (f"default-src 'none'; script-src 'sha256-{script}'; style-src "
                       f"'sha256-{style}'; connect-src 'self'; img-src data:; base-uri 'none'; "
                       "form-action 'none'; frame-ancestors 'none'")

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a client that has gone
            super().handle_error(request, client_address)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers a request: GET / is the page, POST /read reads the picture that is sent."""

    timeout = 10  # seconds that a client may be silent

    def do_GET(self):
        if self.is_allowed('/'):
            self.answer(200, 'text/html; charset=utf-8', self.server.page)

    def do_POST(self):
        if not self.is_allowed('/read'):
            return
        length = self.headers['Content-Length'] or ''
        if not length.isdecimal():
            return self.refuse(411)
        if int(length) > MAX_BYTES:
            return self.refuse(413, f'more than {MAX_BYTES:,} bytes: make the picture smaller')
        status = 422
        try:
            picture = open_picture(io.BytesIO(self.rfile.read(int(length))))
            status = 200  # a picture, be it of a digit or not
            answer = self.server.look(normalise(picture))
        except TimeoutError:
            return self.refuse(408)
        except ValueError as error:
            answer = {'message': str(error)}
        self.answer(status, 'application/json', json.dumps(answer).encode())

    def is_allowed(self, path):
        """Whether the page has sent this; one of another site has another host or origin."""
        host, origin = self.headers['Host'], self.headers['Origin']
        if host not in self.server.hosts or origin not in (None, f'http://{host}'):
            self.refuse(403, 'only its own page may ask this server')
        elif self.path != path:
            self.refuse(404)
        else:
            return True

    def refuse(self, status, message=None):
        """Sends an error, then reads what is still sent, or the client might not see the error."""
        self.send_error(status, message)
        self.connection.settimeout(1)
        with contextlib.suppress(OSError):
            for _ in range(2000):
                if not self.rfile.read1(1 << 16):
                    break

    def answer(self, status, kind, body):
        """Sends an answer."""
        self.send_response(status)
        for header in (('Content-Type', kind), ('Content-Length', str(len(body))),
                       ('Content-Security-Policy', self.server.policy),
                       ('X-Content-Type-Options', 'nosniff'), ('Cache-Control', 'no-store')):
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Nothing on the screen."""


def parse_flags(argv):
    """The command line's flags."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model_dir', default='model', type=os.path.expanduser, metavar='FOLDER',
                        help='that of mnist_deep.py, with its checkpoints (default: %(default)s)')
    parser.add_argument('--data_dir', default=mnist_deep.flag_parser('').get_default('data_dir'),
                        metavar='FOLDER', help='where the MNIST files are (default: %(default)s)')
    parser.add_argument('--port', type=int, default=8000, metavar='N',
                        help='of the address that it prints (default: %(default)s)')
    parser.add_argument('--no_browser', action='store_true', help='open no browser')
    return parser.parse_args(argv)


if __name__ == '__main__':
    sys.exit(mnist_deep.run(main))
