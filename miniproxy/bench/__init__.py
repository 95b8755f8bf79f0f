"""The benchmark: how long this node's kernel takes to follow, under which agent, in which mode, at which size.

It answers for a fair comparison: every agent runs in the same throw-away namespaces, reads the same objects from the
same place, is configured by the same file, and is looked at from outside in the same way. What it finds it hands on
as plain data (results.py), which report.py and plots.py put into words and pictures.

    world.py      the namespaces: a node, its pods, a client, a control plane
    objects.py    the Services and EndpointSlices, by number
    feeds.py      where agents get them: a folder of manifests, or a real API server (apiserver.py)
    agents.py     miniproxy and kube-proxy as processes: start, stop, CPU, memory, metrics
    eye.py        what the kernel holds, asked in microseconds, without the agents' tools
    client.py     connections from the client, and the server in the pods (server.py)
    python_iptables.py, ipvs_tools.py   other ways to write the same rules
    run.py        one agent from an empty kernel to the end: every measure
    campaign.py   which runs, in which order
"""
