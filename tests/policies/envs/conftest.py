"""Environment tests draw with software OpenGL and are skipped by name where nothing can draw."""

from tests.drawing import gl as gl
