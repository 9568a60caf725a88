"""Five backward passes to write yourself, each a small file with its task and its shapes.

1. `ex1_softmax`        v to v @ J, in each row                      steps 1 to 3 and 11
2. `ex2_log_softmax`    the same for log a                           steps 3 and 11
3. `ex3_cross_entropy`  a cost for each row, any y                   step 17
4. `ex4_batch`          the mean of the costs: where the 1/N goes    step 13
5. `ex5_last_layer`     dX, dW and db                                step 14

Open a file, replace its `raise NotImplementedError` by the backward pass, and have it graded:

    python -m lesson.exercises.check 1

Without a number `check` lists how far you are.
"""
