"""A first session in Python, cell by cell: train, look, evaluate, predict. See api.md.

python docs/example.py             # the drawn images of `make train`; minutes on two cores
python docs/example.py DIR         # your images: DIR holds train/ and val/, a folder of images a class in each
"""

# %% Train a recipe
import json
import sys

import fasttricks as ft

print(ft.list_recipes())
data = sys.argv[1] if len(sys.argv) > 1 else "demo"
settings = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {"epochs": 4}  # other fields, as JSON
result = ft.train("demo", data, run_dir="runs/example", **settings)
print(result.metrics)

# %% Look at the training loss
records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
losses = [record["train_loss"] for record in records if "train_loss" in record]
print(f"training loss {losses[0]:.2f} -> {losses[-1]:.2f}")

# %% Evaluate another way: with a test-time flip
print(ft.evaluate(result.run_dir, data, eval={"flip": True}))

# %% Use the loader alone
loader = ft.Loader.open(data, "val", batch_size=8, image_size=48, val_resize=54, device="cpu")
batch = next(iter(loader))
print(batch.images.shape, batch.images.dtype, [loader.classes[label] for label in batch.labels])

# %% Classify images
images = sorted(loader.root.rglob("*.jpg"))[:3]
for prediction in ft.predict(result.run_dir, images, top=2):
    print(prediction.path, prediction.classes or prediction.error)

# %% Take the network into a program of your own
saved = ft.load(result.run_dir)
network = saved.network()
print(type(network).__name__, sum(parameter.numel() for parameter in network.parameters()), saved.classes)
