# keye on a processor: `docker build -t keye . && docker run --rm -p 127.0.0.1:8000:8000 -e KEYE_API_KEY=... keye`
FROM python:3.12-slim

# A compiler for the fast kernels, which are built for the machine that runs them.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --constraint constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu '.[serve]'

# Nothing in the container runs as root, and only the home folder (caches, uploads) is written to.
RUN useradd --create-home --uid 10001 keye
USER keye
ENV TMPDIR=/home/keye OMP_WAIT_POLICY=PASSIVE

EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"

# Beyond loopback the server wants a key: KEYE_API_KEY, or --api-key-file with a mounted file.
ENTRYPOINT ["keye", "serve"]
CMD ["nano", "--host", "0.0.0.0", "--port", "8000"]
