"""Training in processes of their own.

Scripts of one epoch as users write them, each of which prints when its first step was done, and the
recipes in Keras.
"""
