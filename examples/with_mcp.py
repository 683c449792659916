"""Talk to `caravan mcp` as an assistant does, over standard streams: `python examples/with_mcp.py [FOLDER]`."""

import asyncio
import os
import sys
from pathlib import Path

from mcp import Client, StdioServerParameters

from caravan import Dataset, config_from_dict, save, train

folder = sys.argv[1] if len(sys.argv) > 1 else "helpdesk-retriever"


async def main():
    """Start the server, list its tools, and use them."""
    program = Path(sys.executable).with_name("caravan")  # an assistant's settings say just "caravan"
    # Without `env` the server would see PATH and little else, so none of the CARAVAN_... variables.
    server = StdioServerParameters(command=str(program), args=["mcp", folder], env=dict(os.environ))
    async with Client(server) as client:
        print("tools:", [tool.name for tool in (await client.list_tools()).tools])

        found = await client.call_tool("search", {"query": "my bird went dark mid ride", "k": 3})
        for hit in found.structured_content["result"]:
            print(f"{hit['probability']:.0%}  {hit['doc_id']}: {hit['title']}")

        answer = await client.call_tool("ask", {"question": "how do i cancel an order?"})
        print("\n" + answer.structured_content["text"])

        best = found.structured_content["result"][0]["doc_id"]
        document = await client.read_resource(f"caravan://documents/{best}")
        print(f"\n{best} in full: {len(document.contents[0].text)} characters")


if __name__ == "__main__":
    if not Path(folder).exists():
        save(train(Dataset.read("helpdesk"), config_from_dict({"training": {"mode": "head"}})), folder)
    asyncio.run(main())
