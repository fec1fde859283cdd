"""A real Chromium for the tests of the page: it is started, and draws with its pointer."""

import shutil

import numpy as np
from scipy import ndimage
from selenium import webdriver

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
DRIVER = shutil.which('chromedriver')


def start_chromium(profile, width=1400, height=1000):
    """A Chromium without a screen; `profile` is an empty folder."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ('--headless=new', '--no-sandbox', '--disable-gpu', '--no-first-run',
                 '--disable-background-networking', '--disable-component-update',
                 '--disable-sync', '--hide-scrollbars', f'--user-data-dir={profile}',
                 f'--window-size={width},{height}'):
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


def strokes(image):
    """The lines that a pen goes along to write one of MNIST's digits, float32 [784].

    Returns:
        List of strokes, each a list of (row, column) in 28x28.
    """
    ink = image.reshape(28, 28) > 0.5
    depth = ndimage.distance_transform_edt(np.pad(ink, 1))[1:-1, 1:-1]
    around = ndimage.maximum_filter(depth, footprint=[[0, 1, 0], [1, 1, 1], [0, 1, 0]])
    ridge = depth >= around - 0.42
    left = {(int(y), int(x)) for y, x in np.argwhere(ink & ridge)}
    found = []
    while left:
        way = [min(left)]  # where the pen stands, and how it came there
        stroke = list(way)
        left.discard(way[0])
        while way:
            y, x = way[-1]
            near = [(row - y) ** 2 + (column - x) ** 2 for row, column in sorted(left)]
            if near and min(near) <= 8:
                way.append(sorted(left)[int(np.argmin(near))])
                left.discard(way[-1])
                stroke.append(way[-1])
            else:  # back to where another stroke begins
                way.pop()
                if len(stroke) > 1:
                    found.append(stroke)
                stroke = way[-1:]
    return found


def draw(chromium, image):
    """Draws one of MNIST's digits, float32 [784], onto the page's paper by pointer events."""
    left, top, width = chromium.execute_script(
        'const box = document.getElementById("paper").getBoundingClientRect();'
        'return [box.left, box.top, box.width]')

    def point(kind, place, buttons):
        row, column = place
        chromium.execute_cdp_cmd('Input.dispatchMouseEvent', {
            'type': kind, 'button': 'left', 'buttons': buttons, 'clickCount': 1,
            'x': left + (column + 0.5) * width / 28, 'y': top + (row + 0.5) * width / 28})
    for path in strokes(image):
        point('mousePressed', path[0], 1)
        for place in path[4::4]:  # about four pixels apart
            point('mouseMoved', place, 1)
        point('mouseMoved', path[-1], 1)
        point('mouseReleased', path[-1], 0)
