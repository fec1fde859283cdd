"""What goes beyond the tutorial: reading pictures, drawing in the browser, many machines.

Run from the project's folder, after `sh setup.sh extras`:

    python -m extras.predict photo.jpg
    python -m extras.draw
    python -m extras.replica --workers 2
"""
