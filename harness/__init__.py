"""The machinery of long trainings: flags, devices, processes, files, progress. Nothing of the paper is in
here.

It imports torch and the standard library, and never train.py or the files of the paper: what it has to know
of them, train.py hands over. In the order in which a training meets them:

    command_line   flags out of a settings class; a user's mistake told in one line, with exit status 2
    machine        device, precision, memory
    processes      several processes under torchrun: gradients averaged, streams divided
    checkpoints    files that are whole at every moment; what is damaged is noticed; a lock on the folder
    keeper         the one object train.py talks to: it saves, resumes, logs, stops, and shows progress
"""
