# Not built yet: no machine with a container engine was at hand.
#
#   docker build -t demo2eval .
#   docker run --rm -v "$PWD/results:/demo2eval/results" -v "$PWD/.snakemake:/demo2eval/.snakemake" \
#     demo2eval --cores 2 results/quickstart/success.csv
#
# With NVIDIA GPUs: --build-arg EXTRA=cuda, and docker run --gpus all. Apptainer takes the image:
# apptainer build demo2eval.sif docker-daemon://demo2eval:latest

# It has Mesa 25 and Python 3.12.
FROM ubuntu:24.04
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
       ca-certificates git libvulkan1 make mesa-vulkan-drivers python3 python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /demo2eval
COPY . .
ARG EXTRA=
RUN make setup && if [ -n "$EXTRA" ]; then .tools/uv sync --locked --inexact --extra "$EXTRA"; fi
ENV NVIDIA_DRIVER_CAPABILITIES=all
ENTRYPOINT [".venv/bin/snakemake"]
