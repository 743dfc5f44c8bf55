"""The checks of the exercises, one module a chapter, and the mistakes that they know."""
