# miniproxy's image:  docker build -t localhost/miniproxy:0.1.0 .
#
# It runs as root: rules are written by processes with NET_ADMIN, and a container's capabilities are in effect only for
# root, unless files carry them, which allowPrivilegeEscalation: false rules out. deploy/ takes all other capabilities
# away, and the root file system is read-only.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv
RUN python3 -m venv --without-pip /opt/miniproxy && python3 -m venv /opt/pip
COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY miniproxy /src/miniproxy
RUN cd /src && /opt/pip/bin/pip --python /opt/miniproxy/bin/python install --no-cache-dir -c constraints.txt . \
    && python3 -m compileall -q /opt/miniproxy

FROM ${BASE}
# Both variants of iptables come with its package; the agent takes the one that the node's kubelet uses.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 iptables nftables ipset conntrack kmod \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
COPY --from=build /opt/miniproxy /opt/miniproxy
ENV PATH=/opt/miniproxy/bin:/usr/sbin:/usr/bin:/sbin:/bin PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
ENTRYPOINT ["miniproxy"]
CMD ["run"]
