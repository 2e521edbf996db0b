"""Work that is spread over processes and machines, on Ray (extra `ray`) or, without it, on processes of this machine.

The decode service turns video files into planned frames in many workers:

    from keye.cluster.service import Priority, open_service
    from keye.cluster.decode_reader import ServiceDecoder
    from keye.cluster.decode_work import CallWork, VideoWork

    with open_service("local:4") as service:                  # or local, ray, ray://host:port
        future = service.submit(VideoWork(source, config, options), Priority.BATCH)   # waits while too many wait
        frames = future.result()                              # PlannedFrames: plan, uint8 frames; the same bits as here
        service.gauges()                                      # numbers for a metrics page
        service.poisoned                                      # files that killed worker after worker, and their error
        keye.load("nano", decoder=ServiceDecoder(service))    # the videos of every request go through it

`future` is a `concurrent.futures.Future`: `asyncio.wrap_future` awaits it. A file's mistake is the future's
`MediaError`. Results that were not taken yet are bounded in bytes, so take them in order or as they are completed.
`CallWork(function, arguments)` runs any importable function in a worker. `ray_cluster.connect(address)` connects to a
cluster, with one sentence for whatever is wrong with it.

The modules that workers load (`decode_work`, `pool_worker`) leave torch alone unless a release's resizing needs it.
"""
