"""Drawings of one layer, one block, one token, and of the round in which an update is sent."""

from __future__ import annotations

from itertools import pairwise

from .schematics import Drawing

__all__ = [
    "bias_walk",
    "federation",
    "local_steps",
    "neuron",
    "one_round",
    "outer_product",
    "residual_block",
    "token",
    "two_rows",
    "weight_meets_pixels",
]


def one_round() -> Drawing:
    """Draw a server above three clients: weights go down, updates come back."""
    drawing = Drawing(
        278,
        "A server above three clients. Solid arrows carry the weights down to the clients, dashed "
        "arrows carry updates back up; the samples and labels stay in the clients' boxes.",
    )
    drawing.frame(8, 8, 364, 80, "known").text(190, 32, "server", "known", "middle")
    drawing.text(190, 54, "chose the network and its weights θ", "plain", "middle")
    drawing.text(190, 74, "reads each update, averages them", "plain", "middle")
    for client, x in enumerate((8, 134, 260), 1):
        drawing.arrow(x + 46, 92, x + 46, 178, "known")
        drawing.arrow(x + 66, 178, x + 66, 92, "found", dashed=True)
        drawing.frame(x, 182, 112, 88, "found")
        drawing.text(x + 56, 206, f"client {client}", "found", "middle")
        drawing.text(x + 56, 232, "samples x", "plain", "middle")
        drawing.text(x + 56, 252, "labels y", "plain", "middle")
    drawing.text(127, 140, "1 weights θ_{0}", "known", "middle")
    drawing.text(253, 130, "2 update:", "found", "middle")
    return drawing.text(253, 150, "g, or θ_{0} − θ_{T}", "found", "middle")


def federation() -> Drawing:
    """Draw what stays with a client, what crosses the line, and what a server then holds."""
    drawing = Drawing(
        374,
        "Above, the client, with what stays there: the samples x, the labels y, and the outputs of "
        "all layers. Below, the server, with what it knows: the network, its weights theta 0, the "
        "loss, the learning rate, the number of steps. Two arrows cross the line between them: the "
        "weights go up to the client, the update g comes down to the server.",
    )
    drawing.frame(8, 8, 364, 118, "found").text(20, 30, "the client", "found")
    drawing.box(20, 42, 104, "samples x", "found").box(134, 42, 96, "labels y", "found")
    drawing.box(240, 42, 120, "outputs z, k", "found")
    drawing.text(20, 104, "These never leave.", "plain")
    drawing.arrow(110, 246, 110, 132, "known").text(100, 180, "weights θ_{0}", "known", "end")
    drawing.arrow(250, 132, 250, 246, "found").text(260, 174, "update g:", "found")
    drawing.text(260, 194, "what does it tell?", "found")
    drawing.text(180, 186, "the line", "quiet", "middle")
    drawing.frame(8, 252, 364, 114, "known").text(20, 274, "the server", "known")
    drawing.box(20, 286, 104, "network, θ_{0}", "known").box(134, 286, 96, "loss L", "known")
    drawing.box(240, 286, 120, "η, T, shape", "known")
    return drawing.text(20, 350, "It set all of this, and it receives g.", "plain")


def local_steps() -> Drawing:
    """Draw three steps downhill, and the one difference that is sent."""
    drawing = Drawing(
        232,
        "From theta 0, three arrows follow each other downhill: minus eta g1 to theta 1, minus eta "
        "g2 to theta 2, minus eta g3 to theta 3. One dashed arrow leads straight from theta 3 back "
        "to theta 0: the difference that is sent, eta times the sum of the three gradients.",
    )
    points = [(50, 48), (92, 132), (178, 186), (300, 196)]
    for step, ((a, b), (c, d)) in enumerate(pairwise(points), 1):
        drawing.arrow(a, b, c, d, "known")
        shift = (-6, 14) if step == 1 else (-8, 20)
        drawing.text(
            (a + c) / 2 + shift[0], (b + d) / 2 + shift[1], f"−η g_{{{step}}}", "known", "end"
        )
    drawing.arrow(296, 188, 60, 50, "found", dashed=True)
    drawing.text(40, 32, "θ_{0}: what the server sent")
    drawing.text(306, 190, "θ_{3}: what")
    drawing.text(306, 208, "comes back")
    drawing.text(196, 96, "the difference θ_{0} − θ_{3}", "found")
    return drawing.text(196, 116, "= η (g_{1} + g_{2} + g_{3})", "found")


def neuron() -> Drawing:
    """Draw a neuron forward, and what each of its weights hears back."""
    drawing = Drawing(
        386,
        "Above, forward: the inputs x1, x2, x3 go through the weights W1, W2, W3, and a 1 through "
        "the bias b, into a circle z; an arrow leads from z to the loss L. Below, backward: from L "
        "an arrow brings k to the circle; from there k times x1, k times x2, k times x3 go to the "
        "weights, and k times 1, which is k, to the bias.",
    )
    for top, back in ((26, False), (222, True)):
        drawing.text(10, top - 8, "backward" if back else "forward", "found" if back else "quiet")
        drawing.circle(254, top + 66, 26, "k" if back else "z", "found" if back else "plain")
        drawing.box(326, top + 49, 44, "L")
        for place in range(4):
            y = top + 2 + place * 38
            name = f"_{{{place + 1}}}"
            source = "1" if place == 3 else f"x{name}"
            weight = "b" if place == 3 else f"W{name}"
            aim = top + 48 + 12 * place
            if back:
                told = "k · 1 = k" if place == 3 else f"k x{name}"
                target = f"∂L/∂{weight}"
                drawing.text(10, y + 22, f"{target} = {told}", "found")
                drawing.arrow(230, aim, 138, y + 17, "found")
            else:
                drawing.box(10, y, 44, source, "known").text(84, y + (13, 9, 30, 32)[place], weight)
                drawing.arrow(56, y + 17, 226, aim)
        if back:
            drawing.arrow(324, top + 66, 282, top + 66, "found")
        else:
            drawing.arrow(281, top + 66, 323, top + 66)
    return drawing


def outer_product() -> Drawing:
    """Draw the gradient of a dense layer: a column times a row."""
    k, x = (0.9, -0.35, 0.0, -0.8, 0.5), (0.3, 0.9, 0.6, 0.15, 0.75, 0.45, 1.0)
    drawing = Drawing(
        262,
        "A column of five squares, k, with two negative entries and one that is zero; above it to "
        "the right a row of seven squares, x. Between them a table of five rows and seven columns: "
        "each square is the product of its row's k and its column's x. Every row is the same "
        "picture, stronger or weaker, or as a negative; the row of the zero is empty.",
    )
    drawing.cells(110, 30, [x], side=30).text(110, 22, "x: the input, once", "known")
    drawing.cells(28, 78, [[entry] for entry in k], side=30)
    drawing.text(28, 252, "k: one number a neuron").text(84, 158, "×", "plain", "middle")
    drawing.cells(110, 78, [[a * b for b in x] for a in k], side=30)
    drawing.text(328, 98, "k_{1} x").text(328, 128, "k_{2} x", "found")
    drawing.text(328, 158, "silent", "quiet").text(328, 188, "k_{4} x", "found")
    return drawing.text(328, 218, "k_{5} x").text(352, 252, "G = k x^{⊤}", "plain", "end")


def bias_walk() -> Drawing:
    """Draw how one bias settles the length of everything above it and below it."""
    drawing = Drawing(
        352,
        "Three dense layers, the first at the bottom. Only layer 2 has a bias. Its two gradients "
        "give its input x2 and its k2. Upward, the weights give z2, x3 and z3. Downward, the "
        "weights carry k2 to k1, and the gradient of layer 1, divided by k1, gives the picture x.",
    )
    for layer, y in ((3, 52), (2, 154), (1, 256)):
        found = layer == 2
        name = f"W_{{{layer}}}, b_{{{layer}}}" if found else f"W_{{{layer}}}, no bias"
        drawing.box(112, y, 122, name, "known" if found else "plain")
        drawing.text(246, y + 22, f"k_{{{layer}}}", "found")
        drawing.text(98, y + 22, "x" if layer == 1 else f"x_{{{layer}}}", "found", "end")
    drawing.arrow(173, 152, 173, 90, "known").text(180, 126, "φ(W_{2}x_{2} + b_{2})", "known")
    drawing.arrow(173, 50, 173, 22, "known").text(180, 34, "z_{3}, and so the target", "known")
    drawing.arrow(256, 188, 256, 264, "found").text(264, 228, "W_{2}^{⊤}, φ′", "found")
    drawing.arrow(110, 292, 60, 316, "found").text(
        12, 340, "x = G_{1}^{⊤}k_{1} / |k_{1}|^{2}", "found"
    )
    drawing.text(270, 168, "read off its", "quiet").text(270, 186, "bias gradient", "quiet")
    drawing.text(12, 126, "up: forward", "known")
    return drawing.text(12, 228, "down: backward", "found")


def weight_meets_pixels() -> Drawing:
    """Draw the upper left weight of a kernel, at each of its positions."""
    drawing = Drawing(
        276,
        "A picture of five by five pixels. A two by two kernel stands at three of its sixteen "
        "positions. Its upper left weight w1 lies on another pixel at each; over all positions it "
        "meets the sixteen shaded pixels. Below: the gradient of w1 is the sum over all positions "
        "of k at the position times the pixel met there.",
    )
    shaded = [["w_{1}" if i < 4 and j < 4 else "" for j in range(5)] for i in range(5)]
    drawing.cells(190, 16, shaded, "found", side=36)
    drawing.cells(12, 48, [["w_{1}", "w_{2}"], ["w_{3}", "w_{4}"]], "known", side=36)
    drawing.text(12, 38, "the kernel", "known").text(12, 148, "16 positions,", "quiet")
    drawing.text(12, 168, "16 pixels met by w_{1}", "quiet")
    for i, j in ((0, 0), (1, 2), (3, 3)):
        drawing.frame(190 + 36 * j, 16 + 36 * i, 72, 72, "known")
    drawing.text(12, 226, "∂L/∂w_{1} = k(ℓ_{1}) x(ℓ_{1}) + k(ℓ_{2}) x(ℓ_{2}) + …", "found")
    return drawing.text(12, 254, "One number, for sixteen products.", "plain")


def two_rows() -> Drawing:
    """Draw the coefficients of one weight constraint and of one gradient constraint."""
    drawing = Drawing(
        256,
        "Two grids of four by four pixels. Left, one weight constraint: only the four pixels under "
        "the kernel have a coefficient, the filter's numbers 3, minus 2, 1, 2; their weighted sum "
        "is one output. Right, one gradient constraint: nearly every pixel has a coefficient, the "
        "output gradient k moved to one place of the kernel; their weighted sum is one entry of G.",
    )
    weight = [["", "", "", ""], ["", "3", "−2", ""], ["", "1", "2", ""], ["", "", "", ""]]
    gradient = [
        ["2", "1", "−1", "1"],
        ["1", "3", "", "2"],
        ["", "1", "−2", "1"],
        ["1", "", "1", "−1"],
    ]
    drawing.text(14, 24, "one weight row", "known").cells(14, 36, weight, "known", side=40)
    drawing.text(206, 24, "one gradient row", "found").cells(206, 36, gradient, "found", side=40)
    drawing.text(14, 220, "3x_{11} − 2x_{12} + x_{21} + 2x_{22}", "known")
    drawing.text(14, 244, "= one output z(ℓ)", "known")
    drawing.text(206, 220, "2x_{00} + x_{01} − x_{02} + …", "found")
    return drawing.text(206, 244, "= one gradient G(t)", "found")


def residual_block() -> Drawing:
    """Draw in which order values and gradients on the edges of a residual block are found."""
    drawing = Drawing(
        320,
        "A residual block as a graph. From x one way leads up through convolution 1, ReLU and "
        "convolution 2 to a plus sign, the other straight to it; above it is s. Five numbered "
        "steps begin at convolution 2 and end at x.",
    )
    drawing.text(200, 20, "s", "plain", "middle").arrow(200, 52, 200, 26, "known")
    drawing.circle(200, 68, 14, "+", "known")
    for y, name in ((108, "conv 2"), (166, "ReLU"), (224, "conv 1")):
        drawing.box(146, y, 108, name, "known").arrow(200, y, 200, y - 24, "known")
    drawing.arrow(200, 284, 200, 260, "known").text(200, 300, "x", "plain", "middle")
    drawing.line(210, 296, 362, 296, "known").line(362, 296, 362, 68, "known")
    drawing.arrow(362, 68, 216, 68, "known")
    drawing.text(8, 122, "1 read blind: its", "found").text(8, 140, "input and its k", "found")
    drawing.arrow(166, 144, 166, 222, "found", dashed=True)
    drawing.text(8, 180, "2 k goes down", "found").text(8, 198, "to conv 1", "found")
    drawing.text(8, 238, "3 solved by", "found").text(8, 256, "channel: x", "found")
    drawing.arrow(346, 76, 346, 288, "found", dashed=True)
    drawing.text(262, 180, "4 the k of s,", "found").text(262, 198, "unchanged", "found")
    drawing.arrow(166, 260, 186, 288, "found", dashed=True)
    return drawing.text(8, 308, "5 k of x: both parts", "found")


def token() -> Drawing:
    """Draw what one token's gradient is to its position, and what to the layer all share."""
    drawing = Drawing(
        276,
        "A patch goes up through the shared layer E, a position is added, and the sum enters the "
        "transformer. On the way back the token's gradient k arrives at the sum: the position gets "
        "k itself, and E gets the sum over all tokens of k times the patch.",
    )
    drawing.box(112, 8, 156, "everything above", "known")
    drawing.arrow(182, 84, 182, 46, "known").arrow(198, 46, 198, 84, "found", dashed=True)
    drawing.text(208, 72, "k_{t}", "found").circle(190, 100, 14, "+", "known")
    drawing.box(290, 83, 82, "E^{pos}_{t}", "known")
    drawing.arrow(288, 94, 208, 94, "known").arrow(208, 108, 288, 108, "found", dashed=True)
    drawing.text(372, 140, "its gradient: k_{t}", "found", "end")
    drawing.arrow(182, 158, 182, 118, "known").arrow(198, 116, 198, 158, "found", dashed=True)
    drawing.text(208, 150, "k_{t}", "found")
    drawing.box(140, 162, 100, "E, shared", "known").arrow(190, 232, 190, 200, "known")
    drawing.text(8, 168, "its gradient:", "found").text(8, 190, "Σ k_{t} x_{t}^{⊤},", "found")
    drawing.text(8, 212, "over all tokens", "found")
    return drawing.box(140, 234, 100, "patch x_{t}", "plain")
