# nuciseg with all it needs, run by a user without privileges; every node of cluster.yaml runs it.
#
#   docker build -t nuciseg .                          for NVIDIA GPUs on x86-64: PyTorch brings its own CUDA libraries, the
#                                                      host gives the driver (docker run --gpus all)
#   docker build -t nuciseg --build-arg COMPUTE=cpu --build-arg TORCH_INDEX_URL=URL .
#                                                      without CUDA, several GB smaller; URL: the index of PyTorch's CPU wheels
#   docker run --rm --shm-size 2g nuciseg              the smoke test: searches on drawn clusters, then removes what it made
#   docker run --rm --shm-size 2g -v "$PWD:/data" nuciseg python -m nuciseg.train --data.root /data --run.storage_path /data/runs
#
# What is installed is pinned: the base by its point release (or by digest: --build-arg BASE=debian@sha256:...), Python's
# packages by scripts/image-constraints.txt. PyTorch's builds without CUDA come from its own index (TORCH_INDEX_URL).
ARG BASE=debian:12.12-slim

FROM ${BASE} AS build
# Debian's point releases keep no old versions of packages that could be named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/nuciseg
ENV PATH=/opt/nuciseg/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ENV PIP_CONSTRAINT=/src/image-constraints.txt
COPY scripts/image-constraints.txt /src/
ARG COMPUTE=cuda
ARG TORCH_INDEX_URL=""
# The largest layer first and by the pins alone, so that a change of the code does not install PyTorch again. What it
# depends on comes from PyPI below where there is no CUDA: its own index has not every version of it.
RUN grep '^torch' /src/image-constraints.txt > /src/torch.txt \
    && case "${COMPUTE}" in \
        cuda) pip install --requirement /src/torch.txt ;; \
        cpu) pip install --index-url "${TORCH_INDEX_URL:?give the index of the CPU wheels of PyTorch}" --no-deps --requirement /src/torch.txt ;; \
        *) echo "COMPUTE is ${COMPUTE}; give cuda or cpu" >&2; exit 1 ;; \
    esac
COPY pyproject.toml LICENSE README.md /src/
COPY nuciseg /src/nuciseg
RUN pip install '/src[weights,cluster]' && nuciseg --help > /dev/null

FROM ${BASE}
# Ray copies files into the container by rsync, and its head reaches the workers by SSH.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssh-client python3 rsync \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --home-dir /srv/nuciseg --shell /bin/bash --uid 1000 nuciseg \
    # as the user's own: Docker would make the folder of a mounted file as root's
    && install --directory --owner nuciseg --group nuciseg --mode 700 /srv/nuciseg/.ray \
    # Ray's commands run in login shells, which begin with a PATH of their own
    && echo "export PATH=/opt/nuciseg/bin:\$PATH" > /etc/profile.d/nuciseg.sh
COPY --from=build /opt/nuciseg /opt/nuciseg
ENV PATH=/opt/nuciseg/bin:$PATH RAY_USAGE_STATS_ENABLED=0 NO_ALBUMENTATIONS_UPDATE=1 PYTHONUNBUFFERED=1
# HOME is where Ray looks for the place of `~` in file_mounts; the others let NVIDIA's runtime hand over the GPUs.
ENV HOME=/srv/nuciseg NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /srv/nuciseg
COPY tune_configs tune_configs
CMD ["python", "-m", "nuciseg.tune"]
