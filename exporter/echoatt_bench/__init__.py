"""The engines that `echoatt bench` times, each in a worker process of its own.

A package of its own, because importing anything below `echoatt_exporter` loads torch: a process
whose memory is reported must hold the engine and nothing else.
"""
